"""What people say about answers, and what the next model learns from it."""
