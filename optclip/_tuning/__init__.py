"""What `optclip.tuning` is made of: reading logs, statistics, and what is shown of them."""
