"""The only room that touches leaves and devices: `layout`, `measure` and `limit` are its doors."""
