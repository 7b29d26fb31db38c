"""Any file in, a proved backbone out; nothing in a file ever runs."""
