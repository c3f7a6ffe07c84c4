"""From a dense model to a MoH model: routers, the choice of shared heads, new vocabulary, and what it costs."""
