"""What changes a model while it runs: the mask, what it is compared with, and the model that carries one."""
