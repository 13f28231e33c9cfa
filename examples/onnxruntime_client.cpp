// Print the objects in a picture: an ONNX file of `export.py --nms` in ONNX Runtime, the picture read by OpenCV.
//
//   g++ -O2 -std=c++17 onnxruntime_client.cpp -o client -I ORT/include -L ORT/lib -lonnxruntime
//       $(pkg-config --cflags opencv4) -lopencv_core -lopencv_imgproc -lopencv_imgcodecs
//   ./client model.onnx picture.jpg
//
// ORT is a release of https://github.com/microsoft/onnxruntime/releases. Without --stretch in export.py a picture keeps
// its aspect ratio. The names of the classes are in the file, too, as JSON: metadata "names".
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <stdexcept>
#include <vector>

void detect(const char* model, const char* path) {
    Ort::Env env;
    Ort::SessionOptions options;  // in an int8 file the weights of layers that were kept float stay float
    options.AddConfigEntry("optimization.disable_specified_optimizers", "WeightBiasQuantization");
    Ort::Session session(env, model, options);
    std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    if (shape[1] != 3) throw std::runtime_error("the network takes grey images, and this program has colours");
    shape[0] = 1;  // -1 in a file with --dynamic-batch
    const int height = shape[2], width = shape[3];
    const cv::Mat picture = cv::imread(path);
    if (picture.empty()) throw std::runtime_error("the picture cannot be read");

    // Letterbox: bilinear, rounded to whole pixels, centred, on a border of 114.
    const double scale = std::min(double(height) / picture.rows, double(width) / picture.cols);
    const auto scaled = [scale](int side) { return std::max(1, int(std::nearbyint(side * scale))); };
    const cv::Size inner(scaled(picture.cols), scaled(picture.rows));
    const int left = (width - inner.width) / 2, top = (height - inner.height) / 2;
    cv::Mat canvas(height, width, CV_8UC3, cv::Scalar::all(114)), resized;
    cv::resize(picture, resized, inner);
    resized.copyTo(canvas(cv::Rect({left, top}, inner)));
    std::vector<float> images(3 * height * width);  // [1, 3, H, W], RGB, 0...1; OpenCV has BGR
    for (int c = 0, next = 0; c < 3; c++)
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) images[next++] = canvas.at<cv::Vec3b>(y, x)[2 - c] / 255.f;

    const char *inputs[] = {"images"}, *outputs[] = {"detections"};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto tensor = Ort::Value::CreateTensor<float>(memory, images.data(), images.size(), shape.data(), shape.size());
    const auto result = session.Run(Ort::RunOptions(), inputs, &tensor, 1, outputs, 1);
    const int64_t count = result[0].GetTensorTypeAndShapeInfo().GetShape()[0];
    const float* row = result[0].GetTensorData<float>();  // picture, x1, y1, x2, y2 in the input, confidence, class
    const double scale_x = double(inner.width) / picture.cols, scale_y = double(inner.height) / picture.rows;
    for (int64_t number = 0; number < count; number++, row += 7) {
        const double x1 = std::clamp((row[1] - left) / scale_x, 0.0, double(picture.cols));
        const double y1 = std::clamp((row[2] - top) / scale_y, 0.0, double(picture.rows));
        const double x2 = std::clamp((row[3] - left) / scale_x, 0.0, double(picture.cols));
        const double y2 = std::clamp((row[4] - top) / scale_y, 0.0, double(picture.rows));
        std::printf("%.4f %.2f %.2f %.2f %.2f %d\n", row[5], x1, y1, x2, y2, int(row[6]));
    }
}

int main(int count, char** arguments) {
    try {
        if (count != 3) throw std::runtime_error("usage: client model.onnx picture.jpg");
        detect(arguments[1], arguments[2]);
    } catch (const std::exception& failure) {
        std::fprintf(stderr, "error: %s\n", failure.what());
        return 2;
    }
}
