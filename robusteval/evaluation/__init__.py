"""From a model and a suite to a report: plan, judge, assemble, validate."""
