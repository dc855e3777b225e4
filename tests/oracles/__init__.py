"""What is right, in numpy and float64, and the tests that compare long runs with it."""
