"""`diffalign arena`: every method from one base, with one budget, judged alike; a page of results."""
