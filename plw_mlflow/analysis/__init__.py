"""What scores say about the PLW: from a table of scores to a fit, a figure and a report."""
