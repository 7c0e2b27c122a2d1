"""One training objective per file; found by `robusteval.training.objective.OBJECTIVES`."""
