"""From a recipe to results: the plan, its steps, the store of their outputs, the run, publishing."""
