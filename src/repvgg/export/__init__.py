"""Plain networks for other runtimes."""
