"""Find, explain, measure and relax massive activations in language models.

Importing the package loads neither torch nor transformers: each public name, listed in `__init__.pyi`, is fetched when
it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
