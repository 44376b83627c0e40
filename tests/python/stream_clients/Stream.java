import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;

/** Prints the data of the events of a stream as they come, with Java's standard HTTP client as it is. */
class Stream {
    public static void main(String[] arguments) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(arguments[0])).header("Accept", "text/event-stream").build();
        var response = HttpClient.newHttpClient().send(request, BodyHandlers.ofLines());
        if (response.statusCode() != 200) {
            throw new IllegalStateException("status " + response.statusCode());
        }
        response.body().filter(line -> line.startsWith("data: ")).forEach(line -> {
            System.out.println(line.substring("data: ".length()));
            System.out.flush();
        });
    }
}
