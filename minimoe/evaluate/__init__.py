"""How good a model is: perplexity of texts, and benchmark tasks."""
