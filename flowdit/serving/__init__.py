"""The page to try a model: limits, the queue of draws, and the Gradio page with its API."""
