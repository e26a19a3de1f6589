"""Looking inside: what a run did, what a model's experts do, what a run will cost."""
