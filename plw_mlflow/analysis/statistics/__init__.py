"""Statistics of PLW: score tables, models of them, the optimum and how sure it is. Needs numpy, scipy, pandas alone."""
