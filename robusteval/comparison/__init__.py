"""Studies of many training runs: objectives compared under one recipe, and hyper-parameter grids."""
