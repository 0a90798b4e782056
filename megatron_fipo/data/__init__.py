"""Where problems come from and how they become prompts."""
