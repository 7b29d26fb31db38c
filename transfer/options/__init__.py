"""The options of every command, as dataclasses that load without PyTorch; `commands.parse` reads them."""
