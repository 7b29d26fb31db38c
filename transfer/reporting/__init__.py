"""Records of finished runs enter; tables, plots and pages leave."""
