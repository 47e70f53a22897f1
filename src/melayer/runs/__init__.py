"""What long work needs: files that appear whole, logs to go on from, processes, progress."""
