"""Runs side by side, as tables, figures and one page."""
