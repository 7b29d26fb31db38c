"""The version of the project, of all its packages."""

__version__ = "0.2.0"
