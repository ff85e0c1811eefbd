"""From files, the Hub or the built-in picture task to examples, prompts and SFT targets."""
