"""Which PLW a data set asks for, from what has been measured on others."""
