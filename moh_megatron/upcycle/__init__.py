"""Makes a MoH model of a dense one: routers, the choice of shared heads, new vocabulary, and reports of the cost."""
