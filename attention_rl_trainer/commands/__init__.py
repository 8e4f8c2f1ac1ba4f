"""The commands of ``attention-rl``: each a module with a `main`, loaded when it is called."""
