"""The trained pipeline that comes along, and what judges its pictures."""
