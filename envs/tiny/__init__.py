"""`tiny-repairs`: generated repositories with one bug each, their runner and their scripted experts."""
