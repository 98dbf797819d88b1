"""What samples pictures to learn from them: searches, analysis, comparison, plans, benchmarks of ops."""
