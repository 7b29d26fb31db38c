"""One command a module: suite, status, cancel, logs, demo."""
