"""Numbers that say how good, and how sure: metrics, significance, claims."""
