"""How much memory a run takes, worked out before it starts: the trainer's, the engines', and which layouts fit."""
