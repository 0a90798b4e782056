"""Graders and the bounded pool of processes they run in."""
