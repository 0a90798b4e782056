"""Logs, tables and plots of a run."""
