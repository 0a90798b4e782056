"""The flags as data: what the command line accepts, before anything is parsed. Imports neither megatron nor sglang."""
