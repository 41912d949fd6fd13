"""What benchmarks.conformance runs other people's trainers with, and finds out what they trained on by."""
