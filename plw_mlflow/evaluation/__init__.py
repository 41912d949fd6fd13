"""Benchmarks: tasks, prompts, requests, scores."""
