// Prints the data of every event of a stream, as Go's standard client reads it: reader URL
package main

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"strings"
)

func main() {
	request, err := http.NewRequest("GET", os.Args[1], nil)
	if err != nil {
		panic(err)
	}
	request.Header.Set("Accept", "text/event-stream")
	// Nothing is said about compression, so that the client asks for gzip and unpacks it, as it does for every server.
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		panic(err)
	}
	if response.StatusCode != 200 {
		panic(response.Status)
	}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "data: ") {
			fmt.Println(strings.TrimPrefix(lines.Text(), "data: "))
		}
	}
	if lines.Err() != nil {
		panic(lines.Err())
	}
}
