"""Text generation: sampling, a decoding engine with a preallocated cache, one-shot and chat commands."""
