"""What upstream must be taught, one concern a module; nothing is applied at import."""
