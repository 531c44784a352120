"""The demo: a web page that draws samples and lets their codes be edited."""
