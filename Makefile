# The website, from the notebooks as they are stored, into build/site/. It needs: pip install -c constraints.txt -e '.[site]'
site:
	python -m sphinx -q -W --keep-going -d build/doctrees docs build/site
	@echo 'open build/site/index.html'

.PHONY: site
