"""Folders of runs in; results out, labelled, grouped, compared, and beside published figures."""
