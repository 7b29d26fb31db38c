"""Comparisons in, pages out: statements, tables, plots, pictures, HTML and Markdown."""
