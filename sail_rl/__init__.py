"""sail_rl: from an SFT checkpoint of a vision-language model to its Thinking variant. Importing it is cheap."""

__version__ = "0.1.0"
