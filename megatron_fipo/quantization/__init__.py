"""Quantised checkpoints for serving: calibrated and simulated by nvidia-modelopt, written in the layout SGLang loads.

modelopt is imported inside functions alone: nothing else of the project needs it.
"""
