"""`sail-rl plan`: what a recipe's run needs of memory and time on given GPUs, by formulas, before there is any."""
