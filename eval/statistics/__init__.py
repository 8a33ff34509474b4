"""Statistics of items: intervals, paired tests, power, sequential looks."""
