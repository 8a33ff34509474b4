"""Reports: their model, tables, charts, pages, and comparisons of runs."""
