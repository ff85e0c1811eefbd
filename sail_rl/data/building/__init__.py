"""`sail-rl data`: rows for training made from other rows. One command per file; each can be interrupted and goes on."""
