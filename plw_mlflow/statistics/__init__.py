"""The statistics stood here once; they are in `plw_mlflow.analysis.statistics` now.

A regression that was registered at that time still imports its transform from here, where this package is imported
already and hides the copy of it that the regression carries. Nothing else is left here.
"""
